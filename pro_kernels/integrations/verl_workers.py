"""``verl.apply()`` for processes that verl starts: importing this module is the switch.

verl imports in each of them what ``actor_rollout_ref.model.external_lib`` names.
"""

from pro_kernels.integrations import verl

verl.apply()
