"""Training: adapters on a model that is already loaded, from a Plan to a Lora."""
