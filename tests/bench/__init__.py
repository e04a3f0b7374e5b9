"""Measurements, run by hand: figures never belong into a timed test."""
