"""What the server of ranks.py imports once, and does once, for all ranks that it will fork."""

import gc
import threading

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm

import test_models
import test_parity
import train_llm as script


def warm_up() -> None:
    """Two steps in a fake process group, for what is loaded late.

    Its mesh is one that no test has: DTensor's caches would give an equal mesh the groups of this.
    """
    dist.init_process_group("fake", rank=0, world_size=32, store=FakeStore())
    mesh = script.build_mesh("cpu", 2)
    for config in (test_parity.llama(), test_models.config_of("Qwen3", tie_word_embeddings=True)):
        model = test_parity.build_model(config, mesh, torch.float32, 0)
        optimizer = script.build_optimizer(model, 1e-3, 0.1)
        ids = torch.zeros(2, 32, dtype=torch.int64)
        script.train_step(model, optimizer, [(ids, ids)], 1.0, mesh["dp"])
    dist.destroy_process_group()


# In torch's CUDA builds, also without a GPU, FSDP's first backward pass starts threads of autograd,
# after which no fork can train (seen with 2.11 and 2.14); a pass that needs none prevents that.
torch.ones(1, requires_grad=True).sum().backward()
warm_up()
# Each rank has a lock of its own for its progress bars. Else tqdm would make a semaphore, which a
# rank that is killed leaves behind.
tqdm.set_lock(threading.RLock())
gc.collect()
gc.freeze()  # what is there now is not looked at again, so its pages stay shared
