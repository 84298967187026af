"""Connect to Redis, Kafka and NATS, log in, and read their streams as sources."""
