"""The embedded default: a small real model, preference pairs written for this project, and the way through it all."""
