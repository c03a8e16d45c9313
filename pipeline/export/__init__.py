"""What other programs serve: GGUF files in llama.cpp's formats, an adapter, Ollama's Modelfile."""

from pipeline.export.stage import export, export_gguf, list_formats

__all__ = ["export", "export_gguf", "list_formats"]
