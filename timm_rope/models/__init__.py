"""timm entry points. Importing a module of this package registers its models with timm."""
