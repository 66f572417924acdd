"""A pretrained ViT, its adapter and its file formats."""

from upstep_fast.model import timm_import as timm_import  # before any other import of timm
