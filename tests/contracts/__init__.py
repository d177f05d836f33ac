"""Contracts: rules about the code base itself."""
