"""`lora-serve bench`: how fast the engine is, in this process and without the HTTP server."""
