"""``python -m pro_kernels.integrations.swift`` prints the path for ``--external_plugins``."""

from pro_kernels.integrations.swift import PLUGIN

print(PLUGIN)
