"""`llava` as one of several processes on a CPU that accelerate takes for GPUs, since it shards on nothing else."""

import sys

import torch.distributed
from accelerate import PartialState
from accelerate.utils import DistributedType

from modeling_llava.cli import main
from modeling_llava.training import supervised_loss
from tests.tiny import VOCAB_SIZE

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
# Three positions in a chunk: the processes of a run have different numbers of chunks.
supervised_loss.MAX_LOGITS = 3 * VOCAB_SIZE
status = main(sys.argv[1:])
assert not torch.distributed.is_initialized()
sys.exit(status)
