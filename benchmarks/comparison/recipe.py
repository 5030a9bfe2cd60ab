"""How models of a task are built and trained: a small setting for a few CPU cores, a large one for a GPU."""
from dataclasses import dataclass
from typing import Any, Dict, Tuple


@dataclass(frozen=True)
class Recipe:
    """Everything but the encoding and the seed.

    A head has 24 or 48 channels, which pairs, triplets and blocks of 8 all divide: no encoding leaves channels over.

    Attributes:
        sizes: Of test images, in pixels; the first one is that of training, those of at least twice that get every
            rule.
        patch_size: In pixels.
        embed_dim: Channels of a token.
        num_heads: Attention heads.
        depth: Blocks.
        steps: Updates of the weights.
        batch_size: Images of an update.
        learning_rate: Highest one, after a warm-up over a tenth of the steps; a cosine to zero follows.
        weight_decay: Of AdamW.
        test_images: At the size of training. At most so many, half of them at larger sizes.
        turned: Degrees by which test images of the size of training are turned in one more test, where the answer
            stays the same; 0 for no such test.
    """
    sizes: Tuple[int, ...]
    patch_size: int
    embed_dim: int
    num_heads: int
    depth: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = .05
    test_images: int = 2000
    turned: float = 0.

    def model_kwargs(self) -> Dict[str, Any]:
        """Arguments of timm.create_model; LayerScale starts at 1, from 1e-4 a short run gets nowhere."""
        return dict(
            img_size=self.sizes[0], patch_size=self.patch_size, embed_dim=self.embed_dim, num_heads=self.num_heads,
            depth=self.depth, init_values=1.)


def read_recipe(values: Dict[str, Any]) -> Recipe:
    """The recipe that was written into a file of results."""
    return Recipe(**{**values, 'sizes': tuple(values['sizes'])})


TINY: Dict[str, Any] = dict(embed_dim=48, num_heads=2, depth=3, batch_size=64, learning_rate=2e-3, turned=30.)
SMALL: Dict[str, Any] = dict(
    embed_dim=384, num_heads=8, depth=8, batch_size=512, learning_rate=1e-3, test_images=10_000, turned=30.)
RECIPES: Dict[str, Dict[str, Recipe]] = {
    'small': {
        'direction': Recipe(sizes=(20, 40, 60), patch_size=4, steps=1000, **TINY),
        'fashion': Recipe(sizes=(28, 56, 84), patch_size=7, steps=1500, **TINY),
        'photos': Recipe(sizes=(36, 72, 108), patch_size=6, steps=1500, **TINY),
        'digits': Recipe(sizes=(8, 16, 24), patch_size=2, steps=500, **TINY),
        'cifar100': Recipe(sizes=(32, 64, 48), patch_size=4, steps=2000, **TINY),
        'folder': Recipe(sizes=(64, 128, 96), patch_size=16, steps=2000, **TINY),
    },
    'large': {
        'direction': Recipe(sizes=(64, 128, 192), patch_size=8, steps=2000, **SMALL),
        'fashion': Recipe(sizes=(28, 56, 84), patch_size=4, steps=2000, **SMALL),
        'photos': Recipe(sizes=(36, 72, 108), patch_size=3, steps=4000, **SMALL),
        'digits': Recipe(sizes=(8, 16, 24), patch_size=2, steps=500, **SMALL),
        'cifar100': Recipe(sizes=(32, 64, 48), patch_size=4, steps=10_000, **SMALL),
        'folder': Recipe(sizes=(224, 448, 320), patch_size=16, steps=20_000, **SMALL),
    },
}
