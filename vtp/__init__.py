"""Pre-training of visual tokenizers for generation: one ViT auto-encoder learns to align, to distil itself and to draw.

The public pieces live in their rooms: `vtp.models.vtp_hf.VTPModel`, `vtp.tokenizers.get_tokenizer`, `vtp.data`, `vtp.pretrain`.
Nothing is imported here, so that `import vtp` and `vtp --help` stay instant.
"""

__version__ = "0.1.0"
