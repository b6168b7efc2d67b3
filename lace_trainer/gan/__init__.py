"""A small StyleGAN2 and its training."""
