"""Constant load for an hour: does anything grow?"""
