"""The life of an order: identity, durable intent, one send, proof, fills booked once.

Comes from: tasks/, risk/gate.py
Goes to: venues/, stores/, portfolio/positions.py
"""
