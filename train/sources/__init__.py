"""train/sources"""
