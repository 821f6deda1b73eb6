"""Adapters of other training systems. Each module is for one system, and importing it does not import that system."""
