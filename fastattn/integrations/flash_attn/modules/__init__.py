"""flash_attn.modules."""
