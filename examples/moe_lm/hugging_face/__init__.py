"""Hugging Face folders of DeepSeek-V3's kind: their configuration, their keys, their files."""
