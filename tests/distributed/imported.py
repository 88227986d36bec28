"""What a rank imports until its first step is made: seconds, in each of twenty processes."""

# ruff: noqa: F401
import torch._dynamo.repro.after_dynamo
import torch._dynamo.testing
import torch._inductor.decomposition
import torch._inductor.lowering
import torch.export._trace
import torch.export._unlift

import examples.train_ddp
import examples.train_fsdp2
import tests.distributed.test_agreement
import tests.distributed.test_data_parallel
import tests.distributed.test_quantized
from tests.done_once import arrange

arrange()
