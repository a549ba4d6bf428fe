"""The folder that ``pro-kernels run`` puts first on PYTHONPATH; it holds ``sitecustomize``."""
