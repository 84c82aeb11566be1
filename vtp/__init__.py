"""Pre-training of visual tokenizers for generation: one ViT auto-encoder that aligns, distils itself and draws.

The public pieces live in their rooms: `vtp.models.vtp_hf.VTPModel`, `vtp.tokenizers.get_tokenizer`, `vtp.pretrain`.
Nothing is imported here, so that `import vtp` and `vtp --help` stay instant.
"""

__version__ = "0.1.0"
