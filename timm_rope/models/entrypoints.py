"""What the modules of models share: the cfg of ImageNet weights, and entry points that are real functions."""
import os
import sys
from typing import Any, Callable, Dict, List

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import list_models, model_entrypoint, register_model

NAVER = dict(
    origin_url='https://github.com/naver-ai/rope-vit',
    paper_name='Rotary Position Embedding for Vision Transformer',
    paper_ids='arXiv:2403.13298',
)


def imagenet_cfg(**kwargs: Any) -> Dict[str, Any]:
    """pretrained_cfg of a model built for ImageNet at 224."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'interpolation': 'bicubic',
        # makes timm's scripts build the model at --img-size, so that its grid becomes the reference grid
        'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'license': 'apache-2.0',
        **kwargs,
    }


def register(module: str, name: str, create: Callable[..., Any], model_class: str, description: str) -> None:
    """Define an entry point in a module, as a function that timm can register, pickle can find and help() can show.

    Args:
        module: Name of the module, under whose last part timm files the model.
        name: Of the model.
        create: Called with the name, `pretrained` and all other arguments.
        model_class: Name of the class, for the docstring.
        description: Of the model, for the docstring.
    """
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module
    entrypoint.__doc__ = (
        f'{description}\n\nArgs:\n'
        f'    pretrained: Load the weights of the default tag.\n'
        f'    **kwargs: Arguments of {model_class}, of timm.create_model and `out_indices`;\n'
        f'        `rope_warm_start=True` takes over everything but the rotation from weights of another encoding.')
    setattr(sys.modules[module], name, register_model(entrypoint))


def naflex_by_default() -> bool:
    """Whether a user asks timm for NaFlex models by its environment variables, for its ViT or for its rotary ViT."""
    by_vit = os.environ.get('TIMM_USE_NAFLEXVIT', '').lower() == 'true'
    return by_vit or os.environ.get('TIMM_USE_NAFLEX') == '1'


def model_names() -> List[str]:
    """Names of our models that timm knows, in its order."""
    return [name for name in list_models() if model_entrypoint(name).__module__.startswith('timm_rope.')]
