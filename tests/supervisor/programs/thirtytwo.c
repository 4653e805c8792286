/* A 32-bit program: exit(0), by its own numbers. */
void _start(void)
{
    __asm__ volatile("mov $1, %eax; xor %ebx, %ebx; int $0x80");
}
