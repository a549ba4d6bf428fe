"""What ms-swift imports (``--external_plugins``): importing this file is the switch."""

from pro_kernels.integrations import swift

swift.apply()
