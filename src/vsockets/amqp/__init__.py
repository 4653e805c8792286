"""RabbitMQ for guests (the guide's figure 1-1): guest proxy, host proxy and AMQP proxy."""
