"""A numpy array and a torch tensor, from one process's memory into another's."""

import multiprocessing

import numpy as np
import torch

from mooncake_connector.kv_transfer.engine import TransferEngine


def target(pipe):
    array, tensor = np.zeros(1 << 20, np.float32), torch.zeros(1024, 256, dtype=torch.bfloat16)
    engine = TransferEngine()
    pipe.send(engine.offer([engine.register(array), engine.register(tensor)]))
    pipe.recv()
    print("arrived:", int(array.sum()), tensor.float().sum().item())


if __name__ == "__main__":
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(there,))
    process.start()
    engine = TransferEngine()
    peer = engine.connect(here.recv())
    array, tensor = np.ones(1 << 20, np.float32), torch.ones(1024, 256, dtype=torch.bfloat16)
    engine.write(peer, array).wait()
    engine.write(peer, tensor, offset=array.nbytes).wait()
    here.send("look")
    process.join()
