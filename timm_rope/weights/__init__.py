"""From a file or the Hub to the state dict of a model: read, verified, recognised, fitted or refused."""
