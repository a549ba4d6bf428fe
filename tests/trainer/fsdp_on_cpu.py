"""``pro-kernels`` with accelerate's FSDP2 on a CPU, where accelerate by itself shards nothing."""

import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from pro_kernels.__main__ import main


def with_plugin(self, *args, **options):
    init(self, *args, **options)
    if options.get("fsdp_plugin") is not None:
        self.fsdp_plugin = options["fsdp_plugin"]


init, AcceleratorState.__init__ = AcceleratorState.__init__, with_plugin
AcceleratorState.is_fsdp2 = property(lambda self: True)
Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
