"""flash_attn.utils."""
