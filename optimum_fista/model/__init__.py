"""Models: decoder layers, linear operators, the inputs they share, and the statistics of those inputs."""
