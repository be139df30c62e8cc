"""What the fork server of megatron_ranks imports once for all ranks."""

from truedag.parallel.environment import prepare_process

prepare_process()

import truedag.parallel.train  # noqa: E402, F401
