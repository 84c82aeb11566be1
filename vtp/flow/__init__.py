"""Diffusion mathematics over a velocity callable: the path, its times, samplers and guidance.

Time runs from 0 (noise) to 1 (data) everywhere. Nothing here knows of a network, a class or an image.
"""
