"""Teaches the bundled model a shape that it does not know, a crescent, by a LoRA; and judges what it draws."""
