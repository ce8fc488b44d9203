"""Qwen3's weights, in and out."""
