"""Contracts every other room is built on: layers, states, configs, seeds, errors. Nothing is imported eagerly."""
