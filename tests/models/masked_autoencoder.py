"""A masked autoencoder (arXiv 2111.06377) made of two of our models; `test_masked.py` trains it.

The encoder sees a quarter of the patches, each where it is in the image; a light decoder sees all places, a mask token
where there was none, and predicts the pixels of the hidden patches.
"""
import torch
import torch.nn.functional as F
from torch import nn


class MaskedAutoencoder(nn.Module):
    """Takes two models of equal patch size and number of prefix tokens, and the share of the patches that is hidden."""

    def __init__(self, encoder, decoder, drop=0.75):
        super().__init__()
        self.encoder, self.decoder, self.drop = encoder, decoder, drop
        self.patch, self.prefix = encoder.patch_embed.patch_size, encoder.num_prefix_tokens
        self.narrow = nn.Linear(encoder.embed_dim, decoder.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.embed_dim))
        self.to_pixels = nn.Linear(decoder.embed_dim, 3 * self.patch[0] * self.patch[1])

    def encode(self, images, keep):
        """Images and the patches to keep (B, K) -> tokens (B, prefix + K, C)."""
        tokens = self.encoder._pos_embed(self.encoder.patch_embed(images))
        tokens = tokens.gather(1, self.with_prefix(keep, tokens.shape[-1]))
        for block, payload in zip(self.encoder.blocks, self.encoder.rope_payloads(self.grid(images), keep)):
            tokens = block(tokens, payload=payload)
        return self.encoder.norm(tokens)

    def decode(self, tokens, images, keep):
        """Tokens (B, prefix + K, C) -> pixels of all patches (B, N, 3 patch patch)."""
        rows, columns = self.grid(images)
        whole = self.mask_token.expand(len(images), self.prefix + rows * columns, -1)
        whole = whole.scatter(1, self.with_prefix(keep, whole.shape[-1]), self.narrow(tokens))
        for block, payload in zip(self.decoder.blocks, self.decoder.rope_payloads((rows, columns))):
            whole = block(whole, payload=payload)
        return self.to_pixels(self.decoder.norm(whole)[:, self.prefix:])

    def forward(self, images):
        """Images (B, 3, H, W) -> mean squared error of the pixels of the hidden patches."""
        rows, columns = self.grid(images)
        order = torch.rand(len(images), rows * columns, device=images.device).argsort(dim=1)
        keep, hidden = order.tensor_split([round(rows * columns * (1 - self.drop))], dim=1)
        predicted = self.decode(self.encode(images, keep), images, keep)
        pixels = F.unfold(images, self.patch, stride=self.patch).mT
        errors = (predicted - pixels).square().mean(-1)
        return errors.gather(1, hidden).mean()

    def grid(self, images):
        return self.encoder.patch_embed.dynamic_feat_size(images.shape[-2:])

    def with_prefix(self, keep, channels):
        """Places of the kept tokens, those of the prefix in front, as `gather` and `scatter` take them."""
        prefix = torch.arange(self.prefix, device=keep.device).expand(len(keep), -1)
        return torch.cat((prefix, keep + self.prefix), dim=1).unsqueeze(-1).expand(-1, -1, channels)
