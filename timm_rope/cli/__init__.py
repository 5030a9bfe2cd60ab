"""`python -m timm_rope COMMAND`: one module or package for each command, which none of the others imports."""
