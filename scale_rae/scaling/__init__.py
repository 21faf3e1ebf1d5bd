"""Test-time scaling: draw many, let the model judge its own latents and a reward its pictures, keep the best.

experiment  what an experiment is: settings, requests, records      store   its files on disk: whole, locked, resumable
worker      draws and judges prompts on one device                  launch  a worker a device, progress, failures
"""
