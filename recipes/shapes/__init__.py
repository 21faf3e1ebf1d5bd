"""Trains the bundled model: tokenizer, encoder, pixel decoder, then language model and velocity network together."""
