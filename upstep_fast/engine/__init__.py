"""How a frozen ViT runs fast: folded weights, hand-written backward, only what is needed kept."""

import upstep_fast.model  # noqa: F401  (before any other import of timm)
