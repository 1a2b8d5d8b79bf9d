"""Fine-tuning methods: one registry, and how each method prepares a module."""
