"""How a frozen ViT runs fast: folded weights, hand-written backward, only what is needed kept."""
