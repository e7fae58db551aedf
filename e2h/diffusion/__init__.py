"""The diffusion model in pure torch: network, EDM preconditioning, loss, samplers, weight average."""
