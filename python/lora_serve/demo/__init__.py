"""A small trained model with four adapters, to see the engine at work."""
