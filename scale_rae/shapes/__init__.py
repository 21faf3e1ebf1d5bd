"""The bundled model's world: `world` (scenes and texts), `draw` (pictures), `judge` (pictures back to facts)."""
