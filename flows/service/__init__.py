"""What runs around a flow: Prefect's server, deployments, dvc.lock, locks, the GPU's slots."""
