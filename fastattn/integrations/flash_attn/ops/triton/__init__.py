"""flash_attn.ops.triton: by name; whichever backend serves the tensors computes."""
