"""What `warm_torchrun` loads once: everything that an agent and a worker of a run on this machine import."""

import pkgutil
from importlib import import_module

import torch
import torch.distributed.elastic.agent.server.local_elastic_agent
import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
import torch.distributed.run

import data_pipeline.sampling
import gpt.checkpoint
import gpt.config
import gpt.distributed
import gpt.model
import gpt.optimizer
import gpt.run
import gpt.saving
import gpt.training
from gpt.distributed.zero.patches import import_deepspeed

import_deepspeed(torch.device("cpu"))
for package in (
    data_pipeline.sampling,
    gpt.checkpoint,
    gpt.config,
    gpt.distributed,
    gpt.model,
    gpt.optimizer,
    gpt.run,
    gpt.saving,
    gpt.training,
):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)
