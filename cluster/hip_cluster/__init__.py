"""Many machines: tensor-parallel workers on Ray, replicas behind a router, jobs."""
