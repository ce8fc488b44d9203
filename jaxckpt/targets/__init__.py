"""Chips to compile for, present or not."""
