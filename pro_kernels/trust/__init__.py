"""The trust report (``pro-kernels check --full``): every path here, and peers, against fp64."""
